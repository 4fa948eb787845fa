"""Full logits and whole parameters come together from any mesh."""

import pytest

from models.logits_cases import differences
from support.pool import pool


@pytest.mark.parametrize(
    ("sizes", "schedule"),
    [
        ({"col": 4}, "gather"),
        ({"row": 2, "col": 2}, "gather"),
        ({"row": 2, "col": 2}, "summa"),
        ({"inner": 2, "row": 2}, "gather"),
        ({"inner": 2, "depth": 2}, "gather"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama tied", "gpt2"])
def test_logits_do_not_depend_on_the_mesh(name, sizes, schedule):
    for difference, same in pool(4).run(differences, name, sizes, schedule):
        assert difference <= 1e-12 and same
