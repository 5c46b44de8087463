"""`python -m observe write|run`: writes what is generated, or watches a real run with a real Prometheus."""

import argparse

from observe.dashboards import write_dashboards
from observe.metrics_table import write_page
from observe.queue_users import write_users


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m observe", description=__doc__)
    parser.add_argument("what", choices=["write", "run"])
    if parser.parse_args().what == "write":
        write_dashboards()
        write_page()
        write_users()
    else:
        from observe.run import observe_run

        observe_run()


if __name__ == "__main__":
    main()
