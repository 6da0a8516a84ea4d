// The ways in which photos come: files, drag and drop, the clipboard, addresses, samples, the camera.
// Each hands over a list of { name, file } or { name, get }, where get() returns the file later.

import { $, make, touch } from "./dom.js";

const ADDRESS = /^https?:\/\/\S+$/i;
const PICTURE = /^data:image\/[\w.+-]+;base64,[\w+/=\s]+$/i;

export function takeIn(add, complain) {
  for (const input of [$("file"), $("shot")]) {
    input.addEventListener("change", () => {
      add([...input.files].map(fromFile));
      input.value = ""; // so that the same file can be chosen once more
    });
  }
  $("choose").addEventListener("click", () => $("file").click());
  $("drop").addEventListener("click", () => $("file").click());
  listenForDrops(add);
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    const inField = event.target instanceof HTMLInputElement;
    const found = files.length || inField ? files.map(fromFile) : fromText(event.clipboardData?.getData("text/plain"));
    if (!found.length) return;
    event.preventDefault();
    add(found);
  });
  $("address").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("link").value.trim();
    const whole = /^[\w-]+\.[^:\s]+$/.test(text) ? `https://${text}` : text;
    const found = fromText(whole);
    if (!found.length) {
      complain("Enter the address of a photo, as example.org/dog.jpg.");
      $("link").focus();
      return;
    }
    $("link").value = "";
    add(found);
  });
  listenToCamera(add, complain);
}

// --- files

const fromFile = (file) => ({ name: file.name || "photo.jpg", file });

let inside = 0; // drag events come for every element that is crossed
function drag(change) {
  inside = change === 0 ? 0 : inside + change;
  document.body.classList.toggle("dragging", inside > 0);
}

function listenForDrops(add) {
  const types = ["Files", "text/uri-list"];
  const holds = (event) => types.some((type) => event.dataTransfer?.types.includes(type));
  document.addEventListener("dragenter", (event) => holds(event) && drag(1));
  document.addEventListener("dragleave", (event) => holds(event) && drag(-1));
  document.addEventListener("dragover", (event) => holds(event) && event.preventDefault());
  document.addEventListener("drop", async (event) => {
    if (!holds(event)) return;
    event.preventDefault();
    drag(0);
    const { items, files } = event.dataTransfer;
    const entries = [...items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
    if (entries.some((entry) => entry.isDirectory)) {
      const found = [];
      for (const entry of entries) await collect(entry, found, false);
      add(found);
    } else if (files.length) {
      add([...files].map(fromFile));
    } else {
      add(fromText(event.dataTransfer.getData("text/uri-list")));
    }
  });
}

async function collect(entry, found, inFolder) {
  // Of a folder the images alone, in the order of their names.
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    if (!inFolder || file.type.startsWith("image/")) found.push(fromFile(file));
    return;
  }
  const reader = entry.createReader();
  const inner = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) break; // it lists a hundred at a time
    inner.push(...some);
  }
  inner.sort((one, other) => one.name.localeCompare(other.name, undefined, { numeric: true }));
  for (const each of inner) await collect(each, found, true);
}

// --- addresses, which the server fetches: the page itself asks no other site

function fromText(text) {
  if (PICTURE.test(text ?? "")) return decode(text);
  const lines = (text ?? "").split(/\s+/).filter((line) => line && !line.startsWith("#"));
  if ($("address").hidden) return []; // this server fetches none
  return lines.every((line) => ADDRESS.test(line)) ? lines.map(fromAddress) : [];
}

function fromAddress(url) {
  const name = url.replace(/[?#].*/, "").replace(/\/+$/, "").split("/").pop();
  const get = (signal) => fetch("fetch", { method: "POST", body: new URLSearchParams({ url }), signal });
  return { name, get };
}

function decode(text) {
  const [head, base64] = text.split(",");
  try {
    const bytes = Uint8Array.from(atob(base64.replace(/\s/g, "")), (letter) => letter.charCodeAt(0));
    return [{ name: "photo", file: new File([bytes], "photo", { type: head.slice(5).split(";")[0] }) }];
  } catch {
    return []; // cut short
  }
}

// --- samples

export function offerSamples(examples, add) {
  for (const { name, credit, link, licence } of examples) {
    const item = make("li", "", $("samples"));
    const button = make("button", "", item);
    button.type = "button";
    const image = make("img", "", button);
    image.alt = credit;
    image.title = `${credit} (${licence})`;
    image.loading = "lazy";
    image.draggable = false;
    image.src = `examples/${encodeURIComponent(name)}`;
    const get = (signal) => fetch(image.src, { signal });
    button.addEventListener("click", () => add([{ name, get, credit: `${credit} (${licence})`, link }]));
  }
  document.querySelector(".samples").hidden = !examples.length;
}

// --- the camera: the phone's own app where there is a touch screen, else a live video

function listenToCamera(add, complain) {
  const live = Boolean(navigator.mediaDevices?.getUserMedia);
  $("camera").hidden = !touch && !live;
  $("camera").addEventListener("click", () => (touch ? $("shot").click() : openBooth(complain)));
  $("booth").addEventListener("close", () => {
    for (const track of $("video").srcObject?.getTracks() ?? []) track.stop();
    $("video").srcObject = null;
  });
  $("leave").addEventListener("click", () => $("booth").close());
  $("snap").addEventListener("click", () => {
    const video = $("video");
    if (!video.videoWidth) return; // the first frame has not come yet
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => {
      $("booth").close();
      add([{ name: "photo.jpg", file: blob }]);
    }, "image/jpeg", 0.95);
  });
}

async function openBooth(complain) {
  try {
    $("video").srcObject = await navigator.mediaDevices.getUserMedia({
      video: { facingMode: "environment", width: { ideal: 1280 } },
    });
  } catch {
    complain("The camera can’t be used: there is none, or the browser was not allowed to.");
    return;
  }
  $("booth").showModal();
}
