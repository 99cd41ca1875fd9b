// What is going on, how long it still takes, how to stop it, and what went wrong.

function render({ model, el, signal }) {
  const root = section(el, phrase("notice.name"), "se-notice");
  const alertText = make("p", {});
  const dismiss = button(phrase("notice.dismiss"), () => model.send({ do: "dismiss" }), signal);
  const alert = make("div", { class: "se-alert" }, make("div", { role: "alert" }, alertText), dismiss);
  const text = make("p", { class: "se-now", role: "status" });
  const facts = make("p", { class: "se-facts" });
  const left = make("span", { class: "se-mute se-left" });
  const bar = make("div", { class: "se-progress", role: "progressbar", "aria-label": phrase("notice.progress"), "aria-valuemin": 0, "aria-valuemax": 100 }, make("i"));
  const pause = button(phrase("notice.pause"), () => model.send({ do: pause.dataset.act }), signal);
  const stop = button(phrase("notice.stop"), () => model.send({ do: "stop" }), signal);
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
    say(stop, view.stopping ? phrase("notice.stopping") : phrase("notice.stop"));
    pause.hidden = !view.pausable;
    pause.dataset.act = view.paused ? "resume" : "pause";
    say(pause, view.paused ? phrase("notice.resume") : phrase("notice.pause"));
    alert.hidden = !view.error;
    say(alertText, view.error ?? "");
  }, signal);
}

export default { render };
