"""Native kernels, one family a file: the IR generator, what it expects of its tables, and a naive numpy twin.

A kernel is a function ``kernel(arguments, job, scratch)``: `arguments` points to one row of 64-bit fields
(addresses, strides in bytes), `job` says which piece of the work, `scratch` is memory of the calling thread
alone. Kernels know nothing of graphs, buffers or threads.

Where to begin
  `docs/kernels.md` shows how the sparse kernels work, in numpy. Here: layout.py in the folder above (planes,
  gaps, tiles), then builder.py (how to read a generator), flatten.py (the shortest kernel), layer_norm.py
  (sums in registers), conv.py, conv_sparse.py and conv_code.py. Of each kernel the module's text, its tables
  and the numpy twin can be read without the generator. A twin is called `reference`, or the module's text
  says where it is.

Tables
  A `Record` names the fields of a row; the text below it tells of each field what it holds. Where a shape is
  given, ``(images, channels, plane) values``, the field is the address of such an array, and 0 if there is
  none; other fields are numbers. A plane is a channel of an image with the gaps of layout.py; values are what
  planes hold, float32 or float16, see `Isa.precision`; "numbers of four bytes" are weights as `Function.weight`
  reads them. These fields are the same everywhere, and are not explained again:

    x, out, residual, other    values of the operands and the result: the address of pixel 0 of channel 0 of
                               image 0
    .._image, .._plane         bytes from one image to the next, and from one channel to the next
    low, high                  the bounds of the result: the bits of a float32 in the lower half of the field
    jobs, channels, channels_per_job
                               of an image: its jobs, its channels, and how many of these are a job's
                               (channels.py)
    mask                       integers as wide as a value, -1 where a result is kept and 0 where it becomes
                               zero: int32, or int16 beside float16

Words that have several meanings
  row      of an image; of weights: an output channel, or two of one pattern (conv_sparse.py, match_rows.py,
           place_*.py); of a table: one record
  group    output channels whose sums are in registers together (dense kernels, programs); rows of weights of
           one length, one after another in the tables (sparse loops); `groups` of a convolution are torch's
  part     output channels that one job takes (`parts`); vectors of a tile that are taken at once where
           registers are few (`dense_parts`, `pair_parts`, `SparseLoops.parts`)
  piece    of an image or a layer: what several jobs share (pieces.py, linear.py, winograd.py)
  turn     of a sparse row: one nonzero for each of its sets of sums (conv_sparse.py); of the driver: one run
           of several
  place    where something is put in a table: of a nonzero (place_*.py, write_programs.py), or of a vector of
           a result in tiles (`places`)
  block    a K block: operands (input channel x kernel tap) that fit the cache, which all output channels are
           done with before the next ones
  tile     T vectors of neighbouring pixels of all channels
  turned   transposed
"""
