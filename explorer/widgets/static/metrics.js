// Five numbers that always answer: how sparse, how fast, how much faster, how good, how small.

function render({ model, el, signal }) {
  const root = section(el, phrase("figures.name"), "se-card se-metrics");
  const list = make("dl", { class: "se-metrics-list" });
  root.append(list);
  let preview = null; // what the bars that are being dragged will give, until the kernel has said it
  hearPage(model, "preview", (told) => { preview = told; update(); }, signal);
  follow(model, ["view"], update, signal);

  function update() {
    const tiles = model.get("view").tiles ?? [];
    while (list.childElementCount < tiles.length)
      list.append(make("div", { class: "se-tile" }, make("dt"), make("dd", { class: "se-big" }, make("span"), make("i")), make("dd", { class: "se-note" }), make("dd", { class: "se-note" }), make("dd", { class: "se-badge" })));
    tiles.map(previewed).forEach((tile, i) => {
      const [label, big, note, more, badge] = list.children[i].children;
      say(label, tile.label);
      say(big.firstElementChild, tile.value);
      say(big.lastElementChild, tile.unit);
      say(note, bound(tile.note));
      say(more, bound(tile.more ?? ""));
      // Where a badge may come its place is kept: the page must not move under a hand that drags a bar.
      badge.hidden = tile.key !== "accuracy";
      badge.style.visibility = tile.badge ? "visible" : "hidden";
      if (tile.badge) {
        say(badge, tile.badge.text);
        setOne(badge, "data-tone", tile.badge.tone);
        setOne(badge, "title", tile.badge.help || null);
      }
      setOne(list.children[i], "data-tone", tile.tone);
      setOne(list.children[i], "title", tile.help);
      setOne(list.children[i], "data-key", tile.key);
    });
  }

  function previewed(tile) {
    const figure = preview && PREVIEWS[tile.key]?.(preview);
    return figure ? { ...tile, tone: "", ...figure } : tile;
  }
}

/** A unit does not go to the next line without its number. */
const bound = (text) => text.replace(/(\d|±) (?=[\d%×]|ms\b|[kMGT]?B\b)/g, "$1\u00a0");

// As the kernel writes them, see metrics.py.
const known = (value, write) => (value === undefined ? null : write(value));
const milliseconds = (ms) => (ms < 0.1 ? ms.toFixed(4) : ms >= 100 ? ms.toFixed(0) : ms.toPrecision(3));
const PREVIEWS = {
  sparsity: (told) => ({ value: (100 * told.sparsity).toFixed(1) }),
  latency: (told) => known(told.latency_ms, (ms) => ({ label: phrase("figures.latency.predicted"), value: milliseconds(ms) })),
  speedup: (told) => known(told.speedup, (times) => ({ label: phrase("figures.speedup.predicted"), value: times.toFixed(2) })),
  accuracy: (told) => known(told.accuracy, (share) => ({ label: phrase("figures.accuracy.untrained"), value: (100 * share).toFixed(1), tone: "quiet" })),
  size: (told) => ({ value: String(Number((told.size_bytes / 1e6).toPrecision(3))) }),
};

export default { render };
