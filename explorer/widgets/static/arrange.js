// In which order layers stand, which of them belong together, and which are meant by a few letters.

const ORDERS = [["network", "as in the network"], ["time", "by time, longest first"], ["weights", "by weights, most first"], ["harm", "by sensitivity, highest first"], ["sparsity", "by sparsity, highest first"]];
const WIDTHS = [["time", "share of dense time"], ["weights", "share of weights"], ["equal", "all equal"]];
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

/** The block that each layer belongs to: the module around it, or one further out where there would be too many; "" for none. */
function blocksOf(names) {
  const parts = names.map((name) => name.split(".").slice(0, -1));
  const cut = (depth) => parts.map((part) => part.slice(0, depth).join("."));
  let depth = Math.max(1, ...parts.map((part) => part.length));
  while (depth > 1 && new Set(cut(depth)).size > MOST_BLOCKS) depth -= 1;
  return cut(depth);
}

/** Indices of the layers whose names hold all words of `text`; "*" stands for anything. */
function meant(names, text) {
  const words = text.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const patterns = words.map((word) => new RegExp(word.replace(/[.+?^${}()|[\]\\]/g, "\\$&").replaceAll("*", ".*")));
  return names.map((_, i) => i).filter((i) => patterns.every((pattern) => pattern.test(names[i].toLowerCase())));
}
