"""How a model lies on a mesh: the layouts of its streams, its parameters, its steps."""
