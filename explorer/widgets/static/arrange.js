// In which order layers stand, which of them belong together, and which are meant by a few letters.

const ORDERS = [["network", phrase("equalizer.order.network")], ["time", phrase("equalizer.order.time")], ["weights", phrase("equalizer.order.weights")], ["harm", phrase("equalizer.order.harm")], ["sparsity", phrase("equalizer.order.sparsity")]];
const WIDTHS = [["time", phrase("equalizer.width.time"), phrase("equalizer.width.time_means")], ["weights", phrase("equalizer.width.weights"), phrase("equalizer.width.weights_means")], ["equal", phrase("equalizer.width.equal"), phrase("equalizer.width.equal_means")]];
const MOST_BLOCKS = 24;
const USUAL = 0.9; // sparsity at which sensitivities are compared

/** Indices of the layers in the order `how`; layers of which the figure is not known come last. */
function arranged(layers, how, { harm = [], values = [] } = {}) {
  const figure = {
    time: (i) => layers[i].share,
    weights: (i) => layers[i].n_params,
    harm: (i) => between(harm[i], USUAL),
    sparsity: (i) => values[i],
  }[how];
  const indices = layers.map((_, i) => i);
  return figure ? indices.sort((a, b) => (figure(b) ?? -Infinity) - (figure(a) ?? -Infinity) || a - b) : indices;
}

/** The block that each layer belongs to: the outermost module with layers of its own around it, none that holds most of the network; "" for none. */
function blocksOf(names) {
  const parents = [...new Set(names.map((name) => name.split(".").slice(0, -1).join(".")))].filter(Boolean);
  const holds = (parent, name) => name.startsWith(`${parent}.`);
  const small = parents.filter((parent) => parents.length === 1 || names.filter((name) => holds(parent, name)).length <= names.length / 2);
  small.sort((a, b) => a.length - b.length);
  let found = names.map((name) => small.find((parent) => holds(parent, name)) ?? "");
  // One further out, as long as there are too many to be read.
  while (new Set(found).size > MOST_BLOCKS && found.some((block) => block.includes("."))) found = found.map((block) => block.split(".").slice(0, -1).join(".") || block);
  return found;
}

/** Indices of the layers whose names hold all words of `text`; "*" stands for anything. */
function meant(names, text) {
  const words = text.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const patterns = words.map((word) => new RegExp(word.replace(/[.+?^${}()|[\]\\]/g, "\\$&").replaceAll("*", ".*")));
  return names.map((_, i) => i).filter((i) => patterns.every((pattern) => pattern.test(names[i].toLowerCase())));
}
