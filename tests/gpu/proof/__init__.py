"""`python -m tests.gpu.proof`: everything that needs an NVIDIA card, in one command of minutes, most telling first."""
