"""One run on many processes: who there is, shares of a batch, sums of gradients, and what happens when one fails."""
