"""`python -m gmconv.train`: a network of the zoo, trained with Gaussian masks or as its plain twin."""
