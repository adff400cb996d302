"use strict";
// The page of a study. Every text of others arrives as HTML that the server has escaped, or is set as textContent.
const $ = (id) => document.getElementById(id);
const BASE = location.pathname.replace(/\/?$/, "/");
const waitingKey = (item) => `lm-envs waiting ${BASE} ${item}`; // an answer that the server has not acknowledged
const draftKey = (item) => `lm-envs draft ${BASE} ${item}`;
const letter = (k) => String.fromCharCode(65 + k);
let study, task, answer, shownAt, hiddenFor, hiddenSince, unread, busy = false;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "html") element.innerHTML = value;
    else if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

function remember(key, value) { try { value === null ? localStorage.removeItem(key) : localStorage.setItem(key, JSON.stringify(value)); } catch { /* private window */ } }
function recall(key) { try { return JSON.parse(localStorage.getItem(key)); } catch { return null; } }
function unsent() { try { return Object.keys(localStorage).filter((key) => key.startsWith(waitingKey(""))).map(recall).filter(Boolean); } catch { return []; } }
function say(text) { $("banner").textContent = text || ""; $("banner").hidden = !text; }

async function call(path, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const reply = await fetch(BASE + path, { cache: "no-store", ...options });
  let content = {};
  try { content = await reply.json(); } catch { if (reply.ok) throw new TypeError("broken reply"); }
  if (!reply.ok) throw Object.assign(new Error(content.error || `The server answered ${reply.status}.`), { status: reply.status });
  return content;
}

// ---- showing an item ----

function blank() {
  const count = task.responses.length;
  return { ranks: Array(count).fill(null), ratings: Array(count).fill(null), both_bad: false, flags: task.responses.map(() => []),
    reasons: Array(count).fill(""), notes: "" };
}

function show(found) {
  task = found;
  const finished = task.item === null;
  $("main").hidden = finished; $("done").hidden = !finished;
  progress();
  if (finished) { $("done-text").textContent = task.done ? `Thank you. You answered ${task.done} item${task.done === 1 ? "" : "s"}; all answers are saved.` : "There is nothing to do in this study at the moment."; $("done-back").hidden = !task.done; return; }
  const draft = recall(draftKey(task.item));
  answer = Object.assign(blank(), task.answer || {}, draft && draft.version === task.version ? draft.answer : {});
  for (const [name, empty] of Object.entries(blank())) if (Array.isArray(empty) && answer[name].length !== empty.length) answer[name] = empty; // of another mode
  answer.flags = answer.flags.map((names) => names.filter((name) => Object.hasOwn(study.flags, name)));
  shownAt = performance.now(); hiddenFor = 0; hiddenSince = document.hidden ? shownAt : null;
  $("prompt").replaceChildren(...turns(task.prompt));
  $("responses").replaceChildren(...task.responses.map(card));
  $("verdicts").replaceChildren(...verdicts());
  $("lanes").hidden = study.mode !== "rank";
  $("notes").value = answer.notes;
  unread = new Set(study.read_first && !task.answer ? task.responses.keys() : []);
  reach();
  document.querySelectorAll(".card > .text").forEach((box, k) => { const look = () => { if (box.scrollTop + box.clientHeight >= box.scrollHeight - 4 && onScreen(box)) { unread.delete(k); draw(); } }; box.addEventListener("scroll", look); look(); });
  draw();
  scrollTo(0, 0);
  $("prompt").scrollTop = 0;
}

function onScreen(box) { const place = box.getBoundingClientRect(); return place.top < innerHeight && place.bottom <= innerHeight + 4 + box.clientHeight * 0.5; }
addEventListener("scroll", () => document.querySelectorAll(".card > .text").forEach((box) => box.dispatchEvent(new Event("scroll"))), { passive: true });

// What scrolls can be reached by the keyboard, and nothing else.
function reach() { document.querySelectorAll("#prompt, .card > .text").forEach((box) => { box.tabIndex = box.scrollHeight > box.clientHeight ? 0 : -1; }); }
addEventListener("resize", reach);

function progress() {
  const { done, left } = task;
  $("progress").textContent = `${done} answered, ${left} left`;
  $("bar").value = done + left ? done / (done + left) : 1;
}

function turns(prompt) {
  if (!Array.isArray(prompt)) return [make("div", { class: "text", dir: "auto", html: prompt })];
  return prompt.map((turn) => make("div", { class: "turn " + (turn.role === "user" ? "user" : "other") },
    make("div", { class: "role" }, turn.role), make("div", { class: "text", dir: "auto", html: turn.html })));
}

function card(response, k) {
  const controls = make("div", { class: "controls" });
  if (study.mode === "rank") controls.append(scale(k, "ranks", task.responses.map((_, place) => [place, String(place + 1)]), "Rank"));
  if (study.mode === "rate") controls.append(scale(k, "ratings", Array.from({ length: study.scale }, (_, n) => [n + 1, String(n + 1)]), "Rating"));
  const names = Object.keys(study.flags);
  if (names.length) controls.append(make("div", { class: "flags", role: "group", "aria-label": `Flags of ${letter(k)}` }, ...names.map((name) =>
    make("label", { title: study.flags[name] }, make("input", { type: "checkbox", "data-flag": name, onchange: (event) => { flag(k, name, event.target.checked); } }), name))));
  if (study.reasons) controls.append(make("label", {}, "Reason ", make("textarea", { rows: 2, maxlength: 20000, dir: "auto", "data-reason": k, oninput: (event) => { answer.reasons[k] = event.target.value; keep(); } })));
  const head = make("div", { class: "head" }, make("span", {}, `Response ${letter(k)}`), make("span", { class: "mark" }));
  const box = make("article", { class: "card", tabindex: 0, "data-place": k, "aria-label": `Response ${letter(k)}` }, head, make("div", { class: "text", dir: "auto", html: response }));
  if (controls.children.length) box.append(controls);
  if (study.mode === "pair") box.addEventListener("click", (event) => { if (!event.target.closest("input, textarea, label, button") && !String(getSelection())) choose(k); });
  return box;
}

function scale(k, field, values, title) {
  return make("div", { class: "scale", role: "group", "aria-label": `${title} of ${letter(k)}` }, make("span", {}, title), ...values.map(([value, label]) =>
    make("button", { type: "button", "data-value": value, "aria-pressed": "false", onclick: () => set(field, k, value) }, label)));
}

function verdicts() {
  if (study.mode !== "pair") return [];
  const button = (name, label, action) => make("button", { type: "button", "data-verdict": name, "aria-pressed": "false", onclick: action }, label);
  return [button("0", "A is better", () => choose(0)), button("1", "B is better", () => choose(1)), button("tie", "Equally good", tie), button("both_bad", "Both bad", bothBad)];
}

// ---- answering ----

function choose(k) { answer.both_bad = false; answer.ranks = [0, 1].map((place) => (place === k ? 0 : 1)); changed(); }
function tie() { answer.both_bad = false; answer.ranks = [0, 0]; changed(); }
function bothBad() { answer.both_bad = true; answer.ranks = [0, 0]; changed(); }
function set(field, k, value) { answer[field][k] = value; changed(); }
function flag(k, name, on) { answer.flags[k] = answer.flags[k].filter((each) => each !== name).concat(on ? [name] : []); changed(); }
function changed() { keep(); draw(); }
function keep() { if (task && task.item !== null) remember(draftKey(task.item), { version: task.version, answer }); }

function missing() {
  if (unread.size) return "Read every response to its end first.";
  const field = study.mode === "rate" ? "ratings" : "ranks";
  const open = answer[field].flatMap((value, k) => (value === null ? [letter(k)] : []));
  if (!open.length) return "";
  if (study.mode === "pair") return "Choose the better response, or a tie.";
  return `${study.mode === "rate" ? "Rate" : "Rank"} response${open.length > 1 ? "s" : ""} ${open.join(", ")}.`;
}

function draw() {
  if (task.item === null) return;
  document.querySelectorAll(".card").forEach((box, k) => {
    const field = study.mode === "rate" ? "ratings" : "ranks";
    box.querySelectorAll(".scale button").forEach((button) => button.setAttribute("aria-pressed", String(answer[field][k] === Number(button.dataset.value))));
    box.querySelectorAll("[data-flag]").forEach((input) => { input.checked = answer.flags[k].includes(input.dataset.flag); });
    box.querySelectorAll("[data-reason]").forEach((input) => { if (input.value !== answer.reasons[k]) input.value = answer.reasons[k]; });
    const best = study.mode === "pair" ? !answer.both_bad && answer.ranks[k] === 0 && answer.ranks[1 - k] !== null && answer.ranks[1 - k] !== 0 : false;
    box.classList.toggle("chosen", best);
    box.querySelector(".mark").textContent = best ? "better" : "";
  });
  const decided = answer.ranks[0] !== null && study.mode === "pair";
  const verdict = !decided ? "" : answer.both_bad ? "both_bad" : answer.ranks[0] === answer.ranks[1] ? "tie" : String(answer.ranks.indexOf(0));
  document.querySelectorAll("[data-verdict]").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.verdict === verdict)));
  if (study.mode === "rank") lanes();
  const open = missing();
  $("missing").textContent = open;
  $("submit").disabled = Boolean(open) || busy;
  $("back").disabled = !task.done && !task.answer;
}

// ---- ranking by dragging ----

function lanes() {
  const count = task.responses.length;
  const names = [...Array(count).keys()].map((place) => (place === 0 ? "1 best" : place === count - 1 ? `${count} worst` : String(place + 1)));
  const lane = (place, title) => make("div", { class: "lane", "data-lane": place === null ? "" : place }, make("div", {}, title),
    ...answer.ranks.flatMap((rank, k) => (rank === place ? [chip(k)] : [])));
  $("lanes").replaceChildren(...(answer.ranks.includes(null) ? [lane(null, "drag from here")] : []), ...names.map((title, place) => lane(place, title)));
}

function chip(k) {
  const element = make("span", { class: "chip", "data-chip": k }, letter(k));
  element.addEventListener("pointerdown", (start) => {
    start.preventDefault();
    const ghost = element.cloneNode(true);
    ghost.classList.add("dragged");
    document.body.append(ghost);
    const under = (event) => document.elementFromPoint(event.clientX, event.clientY)?.closest(".lane");
    const move = (event) => {
      ghost.style.left = `${event.clientX - 20}px`; ghost.style.top = `${event.clientY - 16}px`;
      document.querySelectorAll(".lane").forEach((lane) => lane.classList.toggle("over", lane === under(event)));
    };
    const end = (event) => {
      removeEventListener("pointermove", move); removeEventListener("pointerup", end); removeEventListener("pointercancel", end);
      ghost.remove();
      const lane = event.type === "pointerup" && under(event);
      if (lane) { answer.ranks[k] = lane.dataset.lane === "" ? null : Number(lane.dataset.lane); changed(); } else draw();
    };
    move(start);
    addEventListener("pointermove", move); addEventListener("pointerup", end); addEventListener("pointercancel", end);
  });
  return element;
}

// ---- saving ----

function body() {
  const now = performance.now();
  const away = hiddenFor + (hiddenSince === null ? 0 : now - hiddenSince);
  const sent = { flags: answer.flags, reasons: answer.reasons, notes: answer.notes, seconds: Math.max(0, Math.round(now - shownAt - away) / 1000) };
  if (study.mode === "rate") sent.ratings = answer.ratings; else sent.ranks = answer.ranks;
  if (study.mode === "pair") sent.both_bad = answer.both_bad;
  return sent;
}

async function send(sent) {
  if (busy) return;
  busy = true; draw();
  const waiting = { item: task.item, version: task.version, answer: sent };
  remember(waitingKey(waiting.item), waiting);
  await deliver(waiting);
}

async function deliver(waiting) {
  for (let pause = 500; ; pause = Math.min(pause * 2, 10000)) {
    try {
      const next = await call(`items/${waiting.item}`, { answer: waiting.answer, version: waiting.version });
      remember(waitingKey(waiting.item), null); remember(draftKey(waiting.item), null);
      busy = false; say("");
      return show(next);
    } catch (error) {
      if (error.status && error.status < 500) { // the server understood, and will not take it
        remember(waitingKey(waiting.item), null); busy = false;
        if (error.status === 409) { remember(draftKey(waiting.item), null); say(error.message); return show(await call(`items/${waiting.item}`)); }
        say(error.message);
        return task ? draw() : show(await call("next"));
      }
      say(`${error.status ? error.message : "The server cannot be reached."} Your answer is kept on this device and sent as soon as it can be.`);
      await new Promise((done) => setTimeout(done, pause));
    }
  }
}

async function back() {
  try { const found = await call(task.item === null ? "before" : `before?item=${task.item}`); if (found.item !== null) { say("You are changing an earlier answer. Saving replaces it."); show(found); } }
  catch (error) { say(error.message); }
}

function skip() {
  $("skip-reasons").replaceChildren(...["I cannot judge this", "The prompt makes no sense", "The text is offensive to me", "A text is cut off or broken", "Another language than mine"].map((reason, k) =>
    make("label", {}, make("input", { type: "radio", name: "reason", value: reason, checked: k === 0 }), " ", reason)));
  $("skip-other").value = "";
  $("skip-dialog").showModal();
}
$("skip-dialog").addEventListener("close", () => {
  if ($("skip-dialog").returnValue !== "skip") return;
  const reason = $("skip-other").value.trim() || document.querySelector("#skip-reasons input:checked").value;
  send({ skipped: reason, flags: answer.flags, reasons: answer.reasons, notes: answer.notes, seconds: body().seconds });
});

$("submit").addEventListener("click", () => { if (!missing()) { say(""); send(body()); } });
$("back").addEventListener("click", back);
$("done-back").addEventListener("click", back);
$("skip").addEventListener("click", skip);
$("notes").addEventListener("input", () => { answer.notes = $("notes").value; keep(); });
document.addEventListener("visibilitychange", () => {
  if (document.hidden) hiddenSince = performance.now();
  else if (hiddenSince !== null) { hiddenFor += performance.now() - hiddenSince; hiddenSince = null; }
});

document.addEventListener("keydown", (event) => {
  if (!task || task.item === null || $("skip-dialog").open || event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest("textarea, input:not([type=checkbox])");
  if (typing) { if (event.key === "Escape") typing.blur(); return; }
  const key = event.key.toLowerCase();
  const place = Number(document.activeElement?.closest?.(".card")?.dataset.place ?? NaN);
  const act = (action) => { event.preventDefault(); action(); };
  if (event.key === "Enter" && !event.target.closest("button, summary")) return act(() => $("submit").click());
  if (key === "u" || event.key === "Backspace") return act(() => $("back").disabled || back());
  if (key === "s") return act(skip);
  if (key === "n") return act(() => $("notes").focus());
  if (study.mode === "pair") {
    if (key === "a" || key === "1" || event.key === "ArrowLeft") return act(() => choose(0));
    if (key === "b" || key === "2" || event.key === "ArrowRight") return act(() => choose(1));
    if (key === "t" || key === "0") return act(tie);
    if (key === "x") return act(bothBad);
    return;
  }
  const cards = document.querySelectorAll(".card");
  if (key.length === 1 && key >= "a" && key < letter(cards.length).toLowerCase()) return act(() => cards[key.charCodeAt(0) - 97].focus());
  if (/^[1-9]$/.test(key) && !Number.isNaN(place)) {
    const value = study.mode === "rank" ? Number(key) - 1 : Number(key);
    if (value <= (study.mode === "rank" ? cards.length - 1 : study.scale)) return act(() => { set(study.mode === "rank" ? "ranks" : "ratings", place, value); (cards[place + 1] || $("submit")).focus(); });
  }
});

async function start() {
  try {
    study = await call("study");
    document.title = study.name; $("name").textContent = study.name; $("question").textContent = study.question;
    $("instructions-text").innerHTML = study.instructions; $("instructions").hidden = !study.instructions;
    if (matchMedia("(max-width: 52rem)").matches) $("instructions").open = $("flags").open = false;
    $("flags").hidden = !Object.keys(study.flags).length;
    $("flags-list").replaceChildren(...Object.entries(study.flags).flatMap(([name, definition]) => [make("dt", { dir: "auto" }, name), make("dd", { dir: "auto" }, definition)]));
    const keys = study.mode === "pair" ? [["A B", "the better response"], ["T", "equally good"], ["X", "both bad"]]
      : [["A B …", "go to a response"], ["1 2 …", study.mode === "rank" ? "its rank; equal ranks are ties" : "its rating"]];
    $("keys-list").replaceChildren(...[...keys, ["Enter", "save and go on"], ["U", "back"], ["S", "skip"], ["N", "notes; Esc leaves them"]].flatMap(([key, what]) =>
      [make("dt", {}, make("kbd", {}, key)), make("dd", {}, what)]));
    const waiting = unsent();
    for (const each of waiting) { busy = true; await deliver(each); }
    if (!waiting.length) show(await call("next"));
  } catch (error) {
    if (error.status < 500) return say(error.message);
    say(error.status ? error.message : "The server cannot be reached; trying again.");
    setTimeout(start, 1500);
  }
}
start();
