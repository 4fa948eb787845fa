"""The one rule: the distributed matrix product. It takes groups and dims, and knows no layouts."""
