"""Linear attention as Pallas kernels, for GPUs (`gpu`) and TPUs (`tpu`)."""
