"""Networks: roles on one frozen backbone, adapters, feature taps, quantization, sharding."""
