"""Options of ``pytest benchmarks/``; their names leave those of tests/ free."""


def pytest_addoption(parser):
    parser.addoption("--benchmark-device", choices=("cpu", "cuda"), default="cpu", help="where operators run: cpu (default) or cuda")
    parser.addoption("--benchmark-quick", action="store_true", help="small shapes")
