// The pictures: a slider through the rounds, the prompt of the picture under the pointer, and an enlarged view.
const pictures = document.querySelector(".pictures"), slider = document.querySelector(".slider");
const dialog = document.querySelector("dialog");
if (slider) {
  const frames = document.querySelectorAll(".strip img");
  const image = document.querySelector("#shown img"), caption = document.querySelector("#shown figcaption b");
  slider.hidden = false;
  slider.querySelector("input").addEventListener("input", (event) => {
    const frame = frames[event.target.value];
    image.src = frame.src;
    image.alt = frame.alt;
    caption.textContent = frame.closest("figure").querySelector("figcaption").textContent.toLowerCase();
  });
}
function showPrompt(event, output) {
  const prompts = JSON.parse(pictures.dataset.prompts), columns = Number(pictures.dataset.columns);
  if (!prompts.length || event.target.tagName !== "IMG") return;
  const box = event.target.getBoundingClientRect(), rows = Math.ceil(prompts.length / columns);
  const column = Math.floor((columns * (event.clientX - box.left)) / box.width);
  const row = Math.floor((rows * (event.clientY - box.top)) / box.height);
  output.textContent = prompts[row * columns + column] ?? "";
}
if (pictures) {
  const large = dialog.querySelector("img");
  for (const button of document.querySelectorAll(".zoom")) {
    button.addEventListener("pointermove", (event) => showPrompt(event, pictures.querySelector(".prompt")));
    button.addEventListener("click", () => {
      const image = button.querySelector("img");
      large.src = image.src;
      large.alt = image.alt;
      large.className = image.className;
      dialog.showModal();
    });
  }
  large.addEventListener("pointermove", (event) => showPrompt(event, dialog.querySelector(".prompt")));
  dialog.querySelector("button").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
}
// The charts: the values of the round under the pointer, or the finger.
for (const area of document.querySelectorAll(".reading")) {
  for (const kind of ["pointerenter", "click"]) {
    area.addEventListener(kind, () => {
      area.closest(".chart").querySelector(".value").textContent = area.textContent;
    });
  }
}
// The hint above each table that does not fit.
function showHints() {
  for (const hint of document.querySelectorAll(".hint")) {
    const region = hint.nextElementSibling;
    hint.style.display = region.scrollWidth > region.clientWidth ? "block" : "none";
  }
}
addEventListener("resize", showHints);
showHints();
