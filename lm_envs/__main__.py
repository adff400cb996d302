"""``python -m lm_envs``, and with it ``torchrun ... -m lm_envs``: the command line."""

from lm_envs.benchmarks.cli import main

if __name__ == "__main__":
    main()
