"""One paper family a file: hyper-parameters, roles, and the updates in the paper's order."""
