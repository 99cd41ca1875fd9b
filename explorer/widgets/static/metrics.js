// Five numbers that always answer: how sparse, how fast, how much faster, how good, how small.

function render({ model, el, signal }) {
  const root = section(el, "Key figures", "se-card se-metrics");
  const list = make("dl", { class: "se-metrics-list" });
  root.append(list);
  follow(model, ["view"], () => {
    const tiles = model.get("view").tiles ?? [];
    while (list.childElementCount < tiles.length)
      list.append(make("div", { class: "se-tile" }, make("dt"), make("dd", { class: "se-big" }, make("span"), make("i")), make("dd", { class: "se-note" }), make("dd", { class: "se-note" }), make("dd", { class: "se-badge" })));
    tiles.forEach((tile, i) => {
      const [label, big, note, more, badge] = list.children[i].children;
      say(label, tile.label);
      say(big.firstElementChild, tile.value);
      say(big.lastElementChild, tile.unit);
      say(note, tile.note);
      say(more, tile.more ?? "");
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
  }, signal);
}

export default { render };
