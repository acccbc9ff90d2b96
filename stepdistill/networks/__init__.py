"""All that is done to a network: roles on one frozen backbone, adapters, taps, quantisation, sharding."""
