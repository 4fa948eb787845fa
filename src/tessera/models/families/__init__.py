"""The families of models: a file each reads its config.json and says where its files keep our parameters."""
