"""The paper's tasks as programs of their own on top of the library: the `vkd` command runs them."""
