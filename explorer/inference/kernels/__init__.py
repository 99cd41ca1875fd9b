"""Native kernels, one family a file: the IR generator, what it expects of its tables, and a naive numpy twin to test it against.

A kernel is a function ``kernel(arguments, job, scratch)``: `arguments` points to one row of 64-bit fields (addresses, strides in bytes),
`job` says which piece of the work, `scratch` is memory of the calling thread alone. Kernels know nothing of graphs, buffers or threads.
"""
