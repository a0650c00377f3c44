"""Triton kernels and their launchers, one file per idea; nothing here chooses, names or validates anything.

Every launcher takes exactly the positional arguments of its registered contract and does not wait for the
device. The kernels run on NVIDIA and AMD from one source, and on the CPU under ``TRITON_INTERPRET=1``.
"""
