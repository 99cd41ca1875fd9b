// Whether there is still a kernel behind the page, told in words when there is not. Only in Voila: a notebook shows that itself.
// The server is asked, and not the kernel, because one that is dead and one that is busy are equally silent; only one that has been
// silent for a minute, in spite of its loop being free of long work, is named as such.

const ASK_MS = 3000;
const MISSED_BEATS = 3;

function lifeline(signal) {
  const config = document.getElementById("jupyter-config-data");
  if (document.body.dataset.voila === undefined || config === null) return { sent() {}, answered() {} };
  const { baseUrl, kernelId } = JSON.parse(config.textContent);
  const text = make("p", {});
  const again = button(phrase("lifeline.reload"), () => location.reload(), signal, { class: "se-primary" });
  const notice = make("div", { class: "se se-lifeline", lang: LANGUAGE }, make("div", { role: "alert" }, text), again);
  notice.hidden = true;
  document.body.append(notice);
  const server = { unheard: 0 };
  let unanswered = 0;
  let ended = false;

  function show() {
    const words = ended
      ? phrase("lifeline.ended")
      : server.unheard > 1
        ? phrase("lifeline.unheard")
        : unanswered >= MISSED_BEATS
          ? phrase("lifeline.unanswered")
          : "";
    notice.hidden = words === "";
    say(text, words);
  }

  async function ask() {
    try {
      const answer = await fetch(`${baseUrl}api/kernels/${kernelId}`, { cache: "no-store", signal });
      server.unheard = 0;
      // 403: another server on the same address, which does not know this page.
      ended = answer.status === 404 || answer.status === 403;
    } catch {
      server.unheard += 1;
    }
    if (signal.aborted) return;
    show();
    if (!ended) timer = setTimeout(ask, ASK_MS);
  }
  let timer = setTimeout(ask, ASK_MS);
  signal.addEventListener("abort", () => { clearTimeout(timer); notice.remove(); });
  return {
    sent() { unanswered += 1; show(); },
    answered() { unanswered = 0; show(); },
  };
}
