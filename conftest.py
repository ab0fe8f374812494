"""What holds for every test, the docstring examples of the package included."""

pytest_plugins = ("tests.leaks",)
