"""How good recovered texts are: metrics, and their evaluation over steps and beam widths."""
