"""How fast this machine is, what TPUs would do, and how long training takes elsewhere (`v2t bench`).

The comparison with PyTorch is not here: `python -m tests.oracle.compare`.
"""
