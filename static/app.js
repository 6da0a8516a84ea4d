// The page: each photo goes to POST caption, in order; one of them is shown large. See docs/app.md.

import { hideAttention, showAttention } from "./attention.js";
import { $, copy, make, megabytes, percent, touch } from "./dom.js";
import { offerSamples, takeIn } from "./intake.js";
import { readSettings, setDefaults, showSettings } from "./settings.js";

const main = document.querySelector("main");
const LOST = "The server can’t be reached. Is it still running?";

// A photo has a name; a file (File or Blob) or a function `get` that returns it later; its state:
// waiting, asked, done or failed; its captions, best first; and which of them is shown large.
const photos = [];
let current = null; // the photo that is shown large
let about = { max_mb: Infinity, at_once: 1, model: { sure: null } };

// --- photos come in

function add(found) {
  const added = found.map((each) => ({ ...each, state: "waiting", captions: [], chosen: 0, seed: 0 }));
  if (!added.length) return;
  for (const photo of added) {
    photos.push(photo);
    photo.card = makeCard(photo);
    if (photo.file) hold(photo, photo.file);
  }
  select(added[0]);
  work();
}

function hold(photo, file) {
  photo.file = file;
  photo.source = URL.createObjectURL(file);
  const image = photo.card.querySelector("img");
  image.src = photo.source;
  image.hidden = false;
}

function drop(photo) {
  photo.request?.abort();
  photo.request = null;
  URL.revokeObjectURL(photo.source);
  photo.card.remove();
}

$("remove").addEventListener("click", () => {
  const { name } = current;
  const place = photos.indexOf(current);
  photos.splice(place, 1);
  drop(current);
  select(photos[Math.min(place, photos.length - 1)]);
  work();
  (photos.length > 1 ? current.card.querySelector("button") : $("choose")).focus();
  $("status").textContent = `${name} is removed.`;
});
$("clear").addEventListener("click", () => {
  photos.splice(0).forEach(drop);
  select(null);
  $("choose").focus();
  $("status").textContent = "All photos are removed.";
});

// --- asking for captions

function work() {
  const waiting = photos.filter((photo) => photo.state === "waiting");
  let free = about.at_once - photos.filter((photo) => photo.state === "asked").length;
  if (waiting.includes(current)) waiting.unshift(current); // what is looked at comes first
  for (const photo of waiting) {
    if (free < 1) break;
    if (photo.state !== "waiting") continue;
    free -= 1;
    ask(photo);
  }
}

async function ask(photo) {
  const request = (photo.request = new AbortController());
  photo.state = "asked";
  photo.error = "";
  show(photo);
  if (photo === current) $("status").textContent = "Captioning the photo.";
  try {
    if (!photo.file) {
      const answer = await photo.get(request.signal);
      if (!answer.ok) throw new Refusal((await answer.json()).error, true);
      const file = await answer.blob();
      if (photo.request !== request) return;
      hold(photo, file);
      show(photo);
    }
    const most = about.max_mb * 1e6;
    if (photo.file.size > most) {
      throw new Refusal(`This file has ${megabytes(photo.file.size)} MB; at most ${megabytes(most)} MB are taken.`);
    }
    const answer = await fetch("caption", { method: "POST", body: form(photo), signal: request.signal });
    const { captions, error } = await answer.json();
    if (!answer.ok) throw new Refusal(error, answer.status >= 500);
    if (photo.request !== request) return;
    Object.assign(photo, { state: "done", captions: distinct(captions), chosen: 0 });
  } catch (error) {
    if (photo.request !== request) return; // it was asked anew, or removed
    const { message, passing } = error instanceof Refusal ? error : new Refusal(LOST, true);
    Object.assign(photo, { state: "failed", captions: [], error: message, passing });
  }
  show(photo);
  tell(photo);
  work();
}

class Refusal extends Error {
  constructor(message, passing = false) {
    super(message);
    this.passing = passing; // whether the same photo may have a caption later
  }
}

function askAnew(some) {
  for (const photo of some) {
    photo.request?.abort();
    photo.request = null;
    photo.state = "waiting";
    show(photo);
  }
  work();
}

function form(photo) {
  const data = new FormData();
  data.append("image", photo.file, photo.name);
  for (const [name, value] of Object.entries(readSettings())) data.append(name, value);
  if (data.get("method") === "sample") data.append("seed", photo.seed);
  return data;
}

// Samples may be the same sentence twice.
const distinct = (captions) => captions.filter(({ text }, place) => captions.findIndex((each) => each.text === text) === place);

function tell(photo) {
  // Only of the photo shown, and of the end: a reader of the screen is not to be talked down.
  const others = photo.captions.length - 1;
  const more = others > 0 ? ` ${others} ${others > 1 ? "alternatives" : "alternative"} below.` : "";
  const parts = photo === current && photo.state === "done" ? [`Caption: ${sentence(photo)}.${more}`] : [];
  if (photos.length > 1 && photos.every(({ state }) => state === "done" || state === "failed")) {
    const failed = photos.filter(({ state }) => state === "failed").length;
    parts.push(failed ? `${photos.length - failed} of ${photos.length} photos have captions, ${failed} failed.` : `All ${photos.length} photos have captions.`);
  }
  if (parts.length) $("status").textContent = parts.join(" ");
}

function complain(message) {
  $("error").textContent = message;
  $("error").hidden = false;
}

// --- the cards of several photos

function makeCard(photo) {
  const item = make("li", "", $("cards"));
  const button = make("button", "", item);
  button.type = "button";
  const frame = make("span", "", button);
  frame.className = "thumb";
  const image = make("img", "", frame);
  image.alt = "";
  image.hidden = true;
  image.draggable = false;
  image.decoding = "async";
  image.loading = "lazy";
  image.addEventListener("error", () => (image.hidden = true));
  make("span", photo.name, button).className = "name";
  make("span", "", button).className = "text";
  button.addEventListener("click", () => select(photo));
  return item;
}

function showCards() {
  document.querySelector(".strip").hidden = photos.length < 2;
  $("count").textContent = `${photos.length} photos`;
  $("copy-all").disabled = !photos.some(({ state }) => state === "done");
  for (const photo of photos) {
    const button = photo.card.querySelector("button");
    const text = { waiting: "waiting", asked: "captioning …", done: sentence(photo), failed: photo.error };
    photo.card.dataset.state = photo.state;
    button.querySelector(".text").textContent = text[photo.state];
    if (photo === current) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}

$("copy-all").addEventListener("click", () => {
  const lines = photos.filter(({ state }) => state === "done").map((photo) => `${photo.name}\t${photo.captions[photo.chosen].text}`);
  copy(lines.join("\n"), $("copy-all"));
});

// --- the photo that is shown large

function select(photo) {
  current = photo;
  const image = $("photo");
  image.removeAttribute("src");
  $("drop").hidden = Boolean(photo);
  $("figure").hidden = !photo;
  $("choose").textContent = photo ? "Add photos" : "Choose photos";
  show(photo);
}

function show(photo) {
  showCards();
  if (photo !== current) return;
  const captioned = Boolean(photo?.captions.length);
  const busy = photo?.state === "waiting" || photo?.state === "asked";
  main.dataset.state = !photo ? "empty" : busy ? (captioned ? "again" : "first") : photo.state;
  $("error").hidden = !photo?.error;
  $("error").textContent = !photo?.error || /[.?!]$/.test(photo.error) ? (photo?.error ?? "") : `${photo.error}.`;
  $("retry").hidden = photo?.state !== "failed" || !photo.passing;
  $("result").hidden = !captioned;
  $("credit").hidden = !photo?.credit;
  if (!photo) return hideAttention("");
  showImage(photo);
  if (photo.credit) showCredit(photo);
  if (captioned) choose(photo.chosen);
  else hideAttention("");
}

function showImage(photo) {
  const image = $("photo");
  image.alt = photo.captions[photo.chosen]?.text ?? photo.name;
  if (photo.source && image.src === photo.source) return;
  image.hidden = !photo.source;
  $("unseen").hidden = Boolean(photo.source);
  $("unseen").textContent = photo.state === "failed" ? "There is no photo to show." : "The photo is being fetched.";
  if (photo.source) image.src = photo.source;
}

$("photo").addEventListener("load", () => {
  const { naturalWidth: width, naturalHeight: height } = $("photo");
  $("photo").parentElement.style.setProperty("--ratio", width / height || 1.5);
});
$("photo").addEventListener("error", () => {
  if (!$("photo").hasAttribute("src")) return;
  $("photo").hidden = true;
  $("unseen").hidden = false;
  $("unseen").textContent = "This browser can’t show this file.";
});

function showCredit({ credit, link }) {
  $("credit").textContent = "Photo: ";
  if (!link) return $("credit").append(credit);
  const anchor = make("a", credit, $("credit"));
  Object.assign(anchor, { href: link, target: "_blank", rel: "noopener noreferrer" });
}

$("retry").addEventListener("click", () => {
  askAnew(photos.filter(({ state, passing }) => state === "failed" && passing));
  $("choose").focus();
});

// --- its caption and the alternatives

function choose(index) {
  current.chosen = index;
  const { words, attention, probability } = current.captions[index];
  showWord(null);
  $("caption").replaceChildren();
  words.forEach((word, place) => {
    const element = make(attention ? "button" : "span", word, $("caption"));
    if (!attention) return;
    element.type = "button";
    element.tabIndex = place ? -1 : 0;
    element.addEventListener("mouseenter", () => showWord(place));
    element.addEventListener("mouseleave", () => showWord(focused()));
    element.addEventListener("focus", () => showWord(place));
    element.addEventListener("blur", () => showWord(null));
    element.addEventListener("click", () => showWord(place));
  });
  if (!words.length) make("em", "(no words)", $("caption"));
  showScore(probability);
  $("list").replaceChildren(...current.captions.flatMap((caption, place) => (place === index ? [] : [row(caption, place)])));
  $("others").hidden = current.captions.length < 2;
  $("photo").alt = current.captions[index].text;
}

function row(caption, index) {
  const item = document.createElement("li");
  const button = make("button", "", item);
  button.type = "button";
  make("span", caption.text || "(no words)", button);
  const share = make("span", rating(caption.probability), button);
  share.className = "share";
  if (about.model.sure) make("span", `${percent(caption.probability)} per word`, share).className = "number";
  button.addEventListener("click", () => {
    const place = [...$("list").children].indexOf(item);
    choose(index);
    showCards();
    $("list").children[place].firstElementChild.focus(); // the caption that it took the place of
    $("status").textContent = `Shown: ${sentence(current)}.`;
  });
  return item;
}

function rating(probability) {
  if (!about.model.sure) return `${percent(probability)} per word`;
  return ["unsure", "fairly sure", "sure"][about.model.sure.filter((least) => probability >= least).length];
}

function showScore(probability) {
  $("score").textContent = about.model.sure ? "The model is " : "";
  const button = make("button", rating(probability), $("score"));
  Object.assign(button, { type: "button", className: "rating" });
  button.setAttribute("aria-describedby", "number");
  const number = make("span", `Each word was ${percent(probability)} probable, on average. That says how usual the sentence is, not whether it is true.`, $("score"));
  Object.assign(number, { id: "number", className: "number" });
  number.setAttribute("role", "tooltip");
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") $("score").querySelector("button:focus")?.blur();
});

function showWord(place) {
  [...$("caption").children].forEach((word, index) => word.classList.toggle("on", index === place));
  const { words, attention } = current?.captions[current.chosen] ?? {};
  if (place === null || !attention) {
    hideAttention(attention ? `${touch ? "Tap" : "Point at"} a word to see where the model looked.` : "");
  } else {
    showAttention(words[place], attention[place]);
  }
}

const focused = () => {
  const place = [...$("caption").children].indexOf(document.activeElement);
  return place < 0 ? null : place;
};

$("caption").addEventListener("keydown", (event) => {
  const words = [...$("caption").querySelectorAll("button")];
  const now = words.indexOf(document.activeElement);
  const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: words.length - 1 }[event.key];
  if (now < 0 || next === undefined) return;
  event.preventDefault();
  const target = words[Math.max(0, Math.min(next, words.length - 1))];
  for (const word of words) word.tabIndex = word === target ? 0 : -1;
  target.focus();
});

$("copy").addEventListener("click", () => copy(current.captions[current.chosen].text, $("copy")));

// --- settings

let pause = 0;
$("settings").addEventListener("input", () => {
  clearTimeout(pause);
  pause = setTimeout(() => askAnew(photos), 250); // a slider on its way passes many values
});
$("again").addEventListener("click", () => {
  if (!current) return;
  current.seed += 1;
  askAnew([current]);
});

async function setUp() {
  showSettings();
  if (touch) $("drop").querySelector(".lead").textContent = "Tap to choose photos";
  takeIn(add, complain);
  try {
    about = await (await fetch("health")).json();
  } catch {
    complain(LOST);
    return;
  }
  const { settings: known, model } = about;
  if (model.name) $("model").textContent = `Model: ${model.name}${model.about ? ` (${model.about})` : ""}.`;
  $("warning").textContent = model.warning;
  $("address").hidden = !about.fetches;
  offerSamples(about.examples, add);
  setDefaults(known);
  work();
}

// --- small things

const sentence = (photo) => photo.captions[photo.chosen]?.text || "no words";

setUp();
