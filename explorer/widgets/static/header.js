// The top of the page: what it is about, the five steps, the theme.

const STEPS = [phrase("header.step.model"), phrase("header.step.sensitivity"), phrase("header.step.distribution"), phrase("header.step.prune"), phrase("header.step.result")];
const STATES = { done: phrase("header.state.done"), now: phrase("header.state.now"), later: phrase("header.state.later") };
const BEAT_MS = 20000;

function render({ model, el, signal }) {
  dress();
  const root = make("div", { class: "se se-header", lang: LANGUAGE });
  el.replaceChildren(root);
  // The page around us cannot give its own box a role, so the first widget does: one main landmark, named.
  // It is drawn before it stands in the page.
  const app = () => el.closest(".se-app");
  const settle = () => {
    if (signal.aborted) return;
    if (!app()) requestAnimationFrame(settle);
    else if (!document.querySelector("main, [role=main]")) setAll(app(), { role: "main", "aria-label": phrase("header.name") });
  };
  settle();
  if (document.body.dataset.voila !== undefined) {
    document.title = phrase("header.name");
    document.documentElement.lang = LANGUAGE;
  }

  const list = make("ol", {});
  const nav = make("nav", { "aria-label": phrase("header.steps") }, list);
  STEPS.forEach((step, i) => {
    const go = button("", () => {
      const target = app()?.querySelector(`[data-se-step="${i + 1}"]`);
      const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
      target?.scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "center" });
    }, signal, { class: "se-step" });
    go.append(make("span", { class: "se-dot", "aria-hidden": "true" }), step, make("span", { class: "se-hidden" }));
    list.append(make("li", {}, go));
  });
  const choice = make("select", { "aria-label": phrase("header.choice"), title: phrase("header.choice_tip") });
  choice.addEventListener("change", () => model.send({ do: "load", index: choice.selectedIndex }), { signal });
  const toggle = button("", () => {
    const next = theme() === "dark" ? "light" : "dark";
    try {
      localStorage.setItem(THEME_KEY, next);
    } catch {
      // Without storage the choice lasts as long as the page.
    }
    document.documentElement.dataset.seTheme = next;
    dressed();
  }, signal, { class: "se-square se-plain", title: phrase("header.theme_tip") });
  function dressed() {
    const dark = document.documentElement.dataset.seTheme === "dark";
    say(toggle, dark ? "☀" : "☾");
    setOne(toggle, "aria-label", dark ? phrase("header.light") : phrase("header.dark"));
  }
  dressed();
  const themes = new MutationObserver(dressed);
  themes.observe(document.documentElement, { attributeFilter: ["data-se-theme"] });
  signal.addEventListener("abort", () => themes.disconnect());

  const title = make("div", { class: "se-title" }, logo(), make("h1", {}, phrase("header.name")));
  root.append(title, nav, make("div", { class: "se-head-right" }, choice, toggle));

  follow(model, ["view"], () => {
    const view = model.get("view");
    const labels = view.choices ?? [];
    setOne(choice, "hidden", labels.length < 1);
    if (choice.childElementCount !== labels.length) choice.replaceChildren(...labels.map((label) => make("option", {}, label)));
    choice.selectedIndex = view.choice ?? 0;
    choice.disabled = Boolean(view.busy);
    (view.steps ?? []).forEach((state, i) => {
      const go = list.children[i].firstElementChild;
      setOne(go, "data-state", state);
      setOne(go, "aria-current", state === "now" ? "step" : null);
      say(go.lastElementChild, STATES[state] ? ` ${STATES[state]}` : "");
    });
  }, signal);

  keepAddress(model, signal);

  // Signs of life, both ways: the kernel stops a job that nobody watches any more, the page tells when nobody answers.
  const line = lifeline(signal);
  const live = () => { line.sent(); model.send({ do: "beat" }); };
  const answered = (said) => { if (said.do === "beat") line.answered(); };
  model.on("msg:custom", answered);
  const timer = setInterval(live, BEAT_MS);
  live();
  addEventListener("pagehide", () => {
    try {
      model.send({ do: "beat", leaving: true });
    } catch {
      // Voila has closed the connection already, and asked for the end of the kernel.
    }
  }, { signal });
  addEventListener("pageshow", live, { signal });
  signal.addEventListener("abort", () => { clearInterval(timer); model.off("msg:custom", answered); });
}

function logo() {
  const svg = draw("svg", { viewBox: "0 0 22 22", width: 24, height: 24, "aria-hidden": "true" });
  const heights = [7, 16, 11, 19];
  heights.forEach((height, i) => svg.append(draw("rect", { x: 1.5 + i * 5.1, y: 21 - height, width: 3.7, height, rx: 1.2, style: `fill:${rampColour([0.95, 0.6, 0.3, 0][i])}` })));
  return svg;
}

export default { render };
