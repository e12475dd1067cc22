"""Options of the whole suite."""


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="many more random cases: minutes instead of seconds")
