// The distribution in the page's address, so that a reload or a link brings it back. Only in the app: a notebook's address is not ours.

const ADDRESS_MS = 500; // browsers refuse more than a few changes of the address a second

function keepAddress(model, signal) {
  if (document.body.dataset.voila === undefined) return;
  let asked = "";
  let timer = null;
  const ask = () => {
    asked = location.hash.slice(1);
    if (asked) model.send({ do: "restore", text: asked });
  };
  const write = () => {
    clearTimeout(timer);
    timer = null;
    const address = model.get("address");
    const wanted = address ? `#${address}` : "";
    if (location.hash !== wanted) history.replaceState(history.state, "", location.pathname + location.search + wanted);
  };
  const changed = () => {
    // What stands in the address is not written over before the kernel has read it.
    if (asked && model.get("heard") !== asked) return;
    timer ??= setTimeout(write, ADDRESS_MS);
  };
  model.on("change:address", changed);
  addEventListener("hashchange", ask, { signal });
  addEventListener("pagehide", () => { if (timer !== null) write(); }, { signal });
  signal.addEventListener("abort", () => { model.off("change:address", changed); clearTimeout(timer); });
  ask();
}
