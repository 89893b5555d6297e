"""Options of ``pytest benchmarks/``; their names do not clash with those of tests/."""


def pytest_addoption(parser):
    parser.addoption(
        "--benchmark-device", choices=("cpu", "cuda"), default="cpu", help="where operators run: cpu (default) or cuda"
    )
    parser.addoption("--benchmark-quick", action="store_true", help="small shapes")
