"""Readers of vector stores: one file each, one read-only protocol (`base.Store`), found by `open_store`.

Nothing is ever unpickled without restriction, and nothing is written: a store is opened read-only, or a copy is.
"""

from v2t_jax.stores.open import open_store as open_store
