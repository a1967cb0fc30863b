// Keeps an open page up to date: fetches it again and changes what differs, so that scroll, focus, what was
// typed and which details are open stay as they are. Without it the page works, and is as old as its load.
"use strict";

(() => {
  const every = 1000 * Number(document.body.dataset.live);
  if (!every) return;
  const news = document.getElementById("news");
  const offline = document.getElementById("offline");
  const text = document.getElementById("live-text");
  const toggle = document.getElementById("live-toggle");
  let paused = false;
  let looking = false;
  let timer = 0;
  let last = summary(document);

  function summary(doc) {
    const found = doc.getElementById("summary");
    return found ? found.textContent.replace(/\s+/g, " ").replace(/\d+ (s|min|h|d) ago/g, "").trim() : "";
  }

  const keyOf = (node) => (node.nodeType === 1 ? node.id || node.dataset.key || "" : "");
  const typed = (node) => /^(INPUT|SELECT|TEXTAREA)$/.test(node.nodeName);

  function patch(old, fresh) {
    if (old.nodeType === 3) {
      if (old.data !== fresh.data) old.data = fresh.data;
      return;
    }
    if (old.nodeType !== 1 || typed(old)) return;
    for (const { name, value } of fresh.attributes) {
      if (name !== "open" && old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    for (const { name } of [...old.attributes]) {
      if (name !== "open" && !fresh.hasAttribute(name)) old.removeAttribute(name);
    }
    const keyed = new Map();
    for (const child of old.childNodes) if (keyOf(child)) keyed.set(keyOf(child), child);
    let at = old.firstChild;
    for (const child of [...fresh.childNodes]) {
      const key = keyOf(child);
      const same = key ? keyed.get(key) : at && !keyOf(at) && alike(at, child) ? at : null;
      if (same && alike(same, child)) {
        if (same === at) at = at.nextSibling;
        else old.insertBefore(same, at);
        patch(same, child);
      } else {
        old.insertBefore(document.importNode(child, true), at);
      }
      keyed.delete(key);
    }
    while (at) {
      const next = at.nextSibling;
      at.remove();
      at = next;
    }
  }

  const alike = (a, b) => a.nodeType === b.nodeType && a.nodeName === b.nodeName && keyOf(a) === keyOf(b);

  async function look() {
    try {
      const answer = await fetch(location.href, { credentials: "same-origin", cache: "no-store" });
      if (answer.status === 401 || answer.status === 403) return stop("You are logged out; load the page again.");
      if (!answer.ok && answer.status !== 503) throw new Error(`answer ${answer.status}`);
      const doc = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = doc.getElementById("main");
      if (!fresh) throw new Error("no page in the answer");
      const focus = document.activeElement;
      patch(document.getElementById("main"), fresh);
      if (focus && focus !== document.activeElement && focus.isConnected) focus.focus({ preventScroll: true });
      const age = doc.getElementById("live-text");
      if (age) text.textContent = age.textContent;
      offline.hidden = true;
      const now = summary(document);
      if (now && now !== last) news.textContent = now;
      last = now;
      document.body.dataset.looks = String(1 + Number(document.body.dataset.looks || 0));
    } catch (problem) {
      offline.textContent = `No answer from the server (${problem.message}). Shown is what was there ${text.textContent}.`;
      offline.hidden = false;
    }
  }

  function stop(why) {
    paused = true;
    offline.textContent = why;
    offline.hidden = false;
  }

  async function tick() {
    clearTimeout(timer);
    if (!paused && !document.hidden && !looking) {
      looking = true;
      await look();
      looking = false;
    }
    clearTimeout(timer);
    timer = setTimeout(tick, every);
  }

  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    paused = !paused;
    toggle.setAttribute("aria-pressed", String(paused));
    toggle.textContent = paused ? "Resume" : "Pause";
    if (!paused) tick();
  });
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) tick();
  });
  timer = setTimeout(tick, every);
})();
