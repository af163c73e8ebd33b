"""python -m dynamicrag.report RESULTS_DIR: see dynamicrag/report/page.py."""

from dynamicrag import stage
from dynamicrag.report.page import main

if __name__ == "__main__":
    stage.run(main)
