// What is in a safetensors file: eight bytes with the length of a JSON text, that text with names and shapes, then the numbers.
// Read here, so that a file that does not fit is not sent. The kernel looks again.

const LONGEST_HEADER = 10e6;
const NAMED = 3;

/** The shapes of a file's tensors by name, and their kinds of numbers in words; throws an error with a sentence for the user when it is no such file. */
async function readShapes(file) {
  if (!file.size) throw new Error(phrase("weights.empty", { name: file.name }));
  const first = new Uint8Array(await file.slice(0, 8).arrayBuffer());
  const length = first.length < 8 ? Infinity : Number(new DataView(first.buffer).getBigUint64(0, true));
  if (length > LONGEST_HEADER) {
    // A zip archive, or a pickle: what torch.save writes.
    const saved = (first[0] === 0x50 && first[1] === 0x4b) || (first[0] === 0x80 && first[1] <= 5);
    throw new Error(saved ? phrase("weights.pickle", { name: file.name }) : phrase("weights.foreign", { name: file.name }));
  }
  if (8 + length > file.size) throw new Error(phrase("weights.cut", { name: file.name, missing: megabytes(8 + length - file.size) }));
  let header;
  try {
    header = JSON.parse(await file.slice(8, 8 + length).text());
  } catch {
    header = null;
  }
  if (header === null || typeof header !== "object") throw new Error(phrase("weights.foreign", { name: file.name }));
  const shapes = new Map(), kinds = new Set();
  let end = 0;
  for (const [name, about] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    if (!Array.isArray(about?.shape) || !Array.isArray(about?.data_offsets)) throw new Error(phrase("weights.foreign", { name: file.name }));
    shapes.set(name, about.shape);
    kinds.add(about.dtype);
    end = Math.max(end, about.data_offsets[1]);
  }
  if (8 + length + end > file.size) throw new Error(phrase("weights.cut", { name: file.name, missing: megabytes(8 + length + end - file.size) }));
  // Tensors that are one and the same are stored once, see explorer/formats/weights.py.
  try {
    for (const [name, stored] of Object.entries(JSON.parse(header.__metadata__?.["sparsity-explorer.tied"] ?? "{}"))) if (shapes.has(stored)) shapes.set(name, shapes.get(stored));
  } catch {
    throw new Error(phrase("weights.foreign", { name: file.name }));
  }
  return { shapes, kinds: [...kinds].join(", ") };
}

/** Why these tensors are not those of the architecture; empty when they are. */
function whyNot(shapes, expected) {
  // Old files lack a count that nothing reads.
  const lacking = Object.keys(expected).filter((name) => !shapes.has(name) && !name.endsWith("num_batches_tracked"));
  const foreign = [...shapes.keys()].filter((name) => !Object.hasOwn(expected, name));
  const other = Object.keys(expected).filter((name) => shapes.has(name) && String(shapes.get(name)) !== String(expected[name]));
  const reasons = [];
  if (lacking.length) reasons.push(phrase("weights.lacks", { names: fewOf(lacking) }));
  if (foreign.length) reasons.push(phrase("weights.has_more", { names: fewOf(foreign) }));
  if (other.length) reasons.push(phrase("weights.other_shape", { name: other[0], found: shapeOf(shapes.get(other[0])), wanted: shapeOf(expected[other[0]]) }));
  return reasons.join(" ");
}

function fewOf(names) {
  const told = names.slice(0, NAMED).join(", ");
  return names.length > NAMED ? phrase("weights.and_more", { names: told, count: names.length - NAMED }) : told;
}

function shapeOf(sizes) {
  return sizes.length ? sizes.join(" × ") : "1";
}

function megabytes(size) {
  return size >= 1e9 ? `${(size / 1e9).toFixed(1)} GB` : size >= 1e5 ? `${(size / 1e6).toFixed(1)} MB` : `${(size / 1e3).toFixed(1)} kB`;
}
