"""One module per family of papers: hyper-parameters, roles, and the updates in the paper's order."""
