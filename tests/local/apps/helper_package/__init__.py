"""A package beside an app, for the tests of add_local_python_source."""

WORD = "from the package"
