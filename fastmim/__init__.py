"""fastmim: one trainer for masked image modelling (MAE, CMAE, ...). See README.md.

Nothing heavy is imported here: `fastmim.boot` must set environment variables before torch is loaded.
"""

__version__ = "0.1.0"
