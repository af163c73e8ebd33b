"""A stage that copies rows, for the tests of the scripts that divide a file: `python -m stand_in IN OUT`.

If ORDERS names a folder, it copies one row at a time, appends its part and its GPUs to the file `tries` there, and obeys the other
files: `crash_N` ends the first try of part N, `wrong_N` ends every try as wrong input does, `broken_HOSTNAME` ends every try on that
node, and `hold` makes all parts wait after a row.
"""

import os
import sys
import time
from pathlib import Path

from dynamicrag import stage
from dynamicrag.rows.output import Output
from dynamicrag.rows.records import read_rows

ROWS = [{"id": f"q{n}", "question": "what?", "docs": [{"id": "d1", "title": "", "text": "x"}]} for n in range(16)]


def obey(orders: Path, part: str) -> None:
    if (crash := orders / f"crash_{part}").exists():
        crash.unlink()
        os._exit(1)
    while (orders / "hold").exists():
        time.sleep(0.05)


def main() -> None:
    parser = stage.ArgumentParser("")
    parser.add_argument("read")
    parser.add_argument("written")
    stage.add_common_flags(parser)
    args = parser.parse_args()
    part, orders = Path(args.read).stem.removeprefix("split_"), Path(os.environ["ORDERS"]) if "ORDERS" in os.environ else None
    if orders:
        if (orders / f"broken_{os.environ.get('HOSTNAME')}").exists():
            sys.exit(1)
        with open(orders / "tries", "a") as file:
            print(part, os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
        if (orders / f"wrong_{part}").exists():
            raise stage.UserError("the input is wrong")
    output = Output(vars(args), [args.written], [args.read])
    if output.finished:
        return
    for chunk in output.chunks(read_rows(args.read), 1 if orders else len(ROWS)):
        output.write(chunk)
        if orders:
            obey(orders, part)
    output.finish()


if __name__ == "__main__":
    stage.run(main)
