// Which weights are on the page, and others to bring: a file from here, looked into before it is sent, or one that the server has.

const PIECE = 1 << 20;

function render({ model, el, signal }) {
  const root = section(el, phrase("weights.name"), "se-card se-weights", 1);
  const shown = make("b");
  const summary = make("summary", { title: phrase("weights.name_tip") }, make("span", {}, phrase("weights.shown")), shown);
  const input = make("input", { type: "file", accept: ".safetensors", hidden: true, "aria-label": phrase("weights.file") });
  const choose = button(phrase("weights.choose"), () => input.click(), signal);
  const limit = make("span", { class: "se-hint" }, phrase("weights.limit", { size: megabytes(model.get("most_bytes")) }));
  const back = button(phrase("weights.back"), () => model.send({ do: "back" }), signal, { title: phrase("weights.back_tip") });
  const server = make("select", { "aria-label": phrase("weights.server"), title: phrase("weights.server_tip") });
  const pick = button(phrase("weights.pick"), () => model.send({ do: "pick", name: server.value }), signal);
  const again = button("↻", () => model.send({ do: "list" }), signal, { class: "se-square se-plain", "aria-label": phrase("weights.list"), title: phrase("weights.list") });
  const folder = make("span", { class: "se-weights-server", role: "group", "aria-label": phrase("weights.server") }, server, pick, again);
  const said = make("p", { class: "se-weights-said", role: "status" });
  const bar = make("div", { class: "se-progress", role: "progressbar", "aria-label": phrase("weights.sending_bar"), "aria-valuemin": 0, "aria-valuemax": 100 }, make("i"));
  const send = button(phrase("weights.send"), () => start(), signal, { class: "se-primary" });
  const stop = button(phrase("weights.cancel"), () => cancel(), signal);
  const open = button(phrase("weights.open"), () => model.send({ do: "open" }), signal, { class: "se-primary" });
  const going = make("div", { class: "se-weights-going" }, bar, send, open, stop);
  const details = make("details", {}, summary, make("div", { class: "se-weights-row" }, choose, input, limit, folder, back), said, going);
  root.append(details);

  let chosen = null; // the file that was looked into and may be sent
  let about = ""; // what is said of it
  let sending = null; // {file, offset}

  async function look(file) {
    chosen = null;
    const most = model.get("most_bytes");
    if (file.size > most) return tell(phrase("weights.too_large", { name: file.name, size: megabytes(file.size), limit: megabytes(most) }), true);
    let shapes, kinds;
    try {
      ({ shapes, kinds } = await readShapes(file));
    } catch (error) {
      // Ours are sentences for the user; the browser's own say nothing to him.
      const sentence = error.constructor === Error ? error.message : phrase("weights.unreadable", { name: file.name });
      return tell(sentence, true);
    }
    const why = whyNot(shapes, model.get("expected"));
    if (why) return tell(phrase("weights.no_fit", { name: file.name, why }), true);
    const numbers = [...shapes.values()].reduce((sum, sizes) => sum + sizes.reduce((product, size) => product * size, 1), 0);
    chosen = file;
    tell(phrase("weights.fits", { name: file.name, size: megabytes(file.size), tensors: shapes.size, numbers: words.count(numbers), kinds }), false);
  }

  function tell(text, wrong) {
    about = text;
    setOne(said, "data-wrong", wrong ? "yes" : null);
    update();
  }

  function start() {
    if (!chosen) return;
    sending = { file: chosen, offset: 0 };
    chosen = null;
    model.send({ do: "begin", name: sending.file.name, size: sending.file.size });
    update();
  }

  function cancel() {
    sending = null;
    chosen = null;
    about = "";
    model.send({ do: "cancel" });
    update();
  }

  async function answered(message) {
    if (!sending || !["received", "refused"].includes(message.do)) return;
    if (message.do === "refused") {
      // The sentence stands where all refusals stand.
      sending = null;
      return tell("", false);
    }
    const { file } = sending;
    sending.offset = message.bytes;
    if (message.bytes >= file.size) {
      sending = null;
      return tell("", false);
    }
    let piece;
    try {
      piece = await file.slice(message.bytes, message.bytes + PIECE).arrayBuffer();
    } catch {
      cancel();
      return tell(phrase("weights.unreadable", { name: file.name }), true);
    }
    if (sending) model.send({ do: "piece", offset: message.bytes }, undefined, [piece]);
    update();
  }

  model.on("msg:custom", answered);
  signal.addEventListener("abort", () => model.off("msg:custom", answered));
  input.addEventListener("change", () => {
    const [file] = input.files;
    // So that the same file, corrected, can be chosen again.
    if (file) look(file).finally(() => { input.value = ""; });
  }, { signal });

  function update() {
    const view = model.get("view");
    const why = view.why_not ?? "";
    const busy = Boolean(why);
    const share = sending ? sending.offset / sending.file.size : view.size ? view.received / view.size : 0;
    const waiting = Boolean(view.waiting) && !sending;
    say(shown, view.current || phrase("weights.own"));
    for (const one of [choose, pick, back, send, open]) {
      one.disabled = busy || Boolean(sending);
      if (one !== back) setOne(one, "title", why || null);
    }
    pick.disabled = pick.disabled || !server.value;
    back.hidden = !view.can_return;
    folder.hidden = !view.has_folder;
    const files = view.files ?? [];
    const labels = files.map(([name, size, when]) => `${name} · ${megabytes(size)} · ${when}`);
    if (labels.join("\n") !== server.dataset.labels) {
      server.dataset.labels = labels.join("\n");
      const options = files.map(([name], i) => make("option", { value: name }, labels[i]));
      server.replaceChildren(...(options.length ? options : [make("option", { value: "" }, phrase("weights.none_there"))]));
      pick.disabled = pick.disabled || !files.length;
    }
    bar.hidden = !sending;
    setOne(bar, "aria-valuenow", Math.round(100 * share));
    bar.firstElementChild.style.width = `${100 * share}%`;
    send.hidden = !chosen;
    open.hidden = !waiting;
    stop.hidden = !chosen && !sending && !waiting;
    going.hidden = stop.hidden;
    const costs = chosen && view.used ? ` ${phrase("weights.costs")}` : "";
    say(said, sending ? phrase("weights.sending", { name: sending.file.name, size: megabytes(sending.file.size) }) : waiting ? phrase("weights.waits", { name: view.name }) : `${about}${costs}`);
  }
  follow(model, ["view", "expected"], update, signal);
}

export default { render };
