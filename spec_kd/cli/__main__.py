"""`python -m spec_kd.cli`, for `accelerate launch -m spec_kd.cli ...`."""

import sys

from spec_kd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
