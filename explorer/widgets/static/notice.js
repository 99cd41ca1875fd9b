// What is going on, how long it still takes, how to stop it, and what went wrong.

function render({ model, el, signal }) {
  const root = section(el, "Status", "se-notice");
  const alertText = make("p", {});
  const dismiss = button("Dismiss", () => model.send({ do: "dismiss" }), signal);
  const alert = make("div", { class: "se-alert" }, make("div", { role: "alert" }, alertText), dismiss);
  const text = make("p", { class: "se-now", role: "status" });
  const facts = make("p", { class: "se-facts" });
  const left = make("span", { class: "se-mute se-left" });
  const bar = make("div", { class: "se-progress", role: "progressbar", "aria-label": "Progress", "aria-valuemin": 0, "aria-valuemax": 100 }, make("i"));
  const pause = button("Pause", () => model.send({ do: pause.dataset.act }), signal);
  const stop = button("Stop", () => model.send({ do: "stop" }), signal);
  const line = make("div", { class: "se-strip" }, text, bar, left, pause, stop, facts);
  root.append(line, alert);

  follow(model, ["view"], () => {
    const view = model.get("view");
    say(text, view.text ?? "");
    say(left, view.left ?? "");
    say(facts, view.facts ?? "");
    const share = view.share ?? null;
    bar.hidden = !view.busy || share === null;
    setOne(bar, "aria-valuenow", share === null ? null : Math.round(100 * share));
    bar.firstElementChild.style.width = `${100 * (share ?? 0)}%`;
    left.hidden = !view.busy;
    stop.hidden = !view.stoppable;
    stop.disabled = Boolean(view.stopping);
    say(stop, view.stopping ? "Stopping" : "Stop");
    pause.hidden = !view.pausable;
    pause.dataset.act = view.paused ? "resume" : "pause";
    say(pause, view.paused ? "Resume" : "Pause");
    alert.hidden = !view.error;
    say(alertText, view.error ?? "");
  }, signal);
}

export default { render };
