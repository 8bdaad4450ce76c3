const slider = document.querySelector(".slider"), frames = document.querySelectorAll(".strip img");
const image = document.querySelector("#shown img"), caption = document.querySelector("#shown figcaption b");
slider.hidden = false;
slider.querySelector("input").addEventListener("input", (event) => {
  const frame = frames[event.target.value];
  image.src = frame.src;
  image.alt = frame.alt;
  caption.textContent = frame.closest("figure").querySelector("figcaption").textContent.toLowerCase();
});
