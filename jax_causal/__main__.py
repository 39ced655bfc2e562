"""`python -m jax_causal` is `jax-causal`."""

import sys

from jax_causal.cli import main

sys.exit(main())
