"""`python -m pixellm.jobs.train.warm_up`: lets DeepSpeed compile what it compiles on first use; part of the set-up."""

import sys

from pixellm.jobs.train.build_lock import needs_compilation
from pixellm.jobs.train.deepspeed_engine import import_deepspeed


def main() -> None:
    """Compiles where needed, and says so."""
    if not needs_compilation():
        return
    print(
        "compiling DeepSpeed's CPU communication op (about a minute, once per machine) …", file=sys.stderr, flush=True
    )
    import_deepspeed(use_gpu=False)


if __name__ == "__main__":
    main()
