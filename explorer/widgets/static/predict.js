// What sparsities will give, from the tables that travelled to the page once: the sums of explorer.distribution.predict, done in the frame in which a bar moves.

/** Value of a curve `[sparsities, values]`: linear between its knots, the nearest value outside. */
const onCurve = (curve, at) => between(curve, Math.min(curve[0].at(-1), Math.max(curve[0][0], at)));

/** Zeros of a layer: at least what was asked for, but one weight stays. */
const zerosOf = (count, sparsity) => Math.min(count - 1, Math.ceil(sparsity * count - 1e-9));

/**
 * Predict. `tables` are those of `PredictionTables.to_page`, `values` the sparsity of each layer.
 * Figures that the tables do not give are left out.
 */
function predict(tables, values) {
  const { n_params: counts, curves, dense } = tables;
  const sum = (each) => counts.reduce((total, count, i) => total + each(count, i), 0);
  const zeros = values.map((value, i) => zerosOf(counts[i], value));
  const told = {
    sparsity: sum((_, i) => zeros[i]) / sum((count) => count),
    size_bytes: tables.other_bytes + sum((count, i) => Math.min(Math.ceil(count / 8) + 4 * (count - zeros[i]), 4 * count)),
  };
  for (const [kind, base] of Object.entries(dense))
    told[kind] = base + sum((_, i) => (values[i] === 0 ? 0 : onCurve(curves[kind][i], values[i]) - onCurve(curves[kind][i], 0)));
  const harm = dense.kl !== undefined ? told.kl : told.loss - dense.loss;
  if (Number.isFinite(harm)) told.harm = Math.max(0, harm);
  if (told.accuracy !== undefined) told.accuracy = Math.max(0, told.accuracy);
  if (tables.fixed_ms !== null && curves.latency_ms) {
    told.latency_ms = tables.fixed_ms + tables.scale * sum((_, i) => onCurve(curves.latency_ms[i], values[i]));
    if (tables.baseline_ms !== null && told.latency_ms > 0) told.speedup = tables.baseline_ms / told.latency_ms;
  }
  return told;
}
