// Keeps one's own place in the run up to date without a reload: asks for this page again, and takes over what the server
// wrote. The page is complete without it.
"use strict";

const POLL = 3000;
const POLL_HIDDEN = 30000;
const PATIENCE = 8000;

// a page that many look at has its live parts at an address of their own
const source = document.querySelector("[data-live-from]")?.dataset.liveFrom ?? location.href;

async function update() {
  const answer = await fetch(source, {
    cache: "no-store",
    headers: { "Accept-Language": document.documentElement.lang },
    signal: AbortSignal.timeout(PATIENCE),
  });
  if (answer.status >= 500) throw new Error(`the coordinator answered ${answer.status}`);
  // signed out meanwhile: the page of the sign-in is not this one
  if (!answer.ok || answer.redirected) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const shown of document.querySelectorAll("[data-live]")) {
    const now = fresh.getElementById(shown.id);
    // an equal text is left alone, so that a selection in it, and a screen reader's place, survive
    if (now && now.innerHTML !== shown.innerHTML) shown.replaceChildren(...now.childNodes);
  }
}

let timer;

async function poll() {
  try {
    await update();
    document.body.classList.remove("lost");
  } catch {
    // the coordinator is away: what is shown stays, and the next poll asks again
    document.body.classList.add("lost");
  } finally {
    clearTimeout(timer);
    timer = setTimeout(poll, document.hidden ? POLL_HIDDEN : POLL);
  }
}

document.addEventListener("visibilitychange", () => document.hidden || poll());

timer = setTimeout(poll, POLL);
