"""Rewards: differentiable scores of images and their prompts, one a file. `base.Reward` is the contract."""
