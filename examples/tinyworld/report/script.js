// Takes the clock over from the style sheet, so that a scene can be paused and dragged.
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
for (const stage of document.querySelectorAll(".stage")) {
  const slider = stage.querySelector("input");
  const shown = stage.querySelector("output");
  const count = Number(slider.max) + 1;
  let started = performance.now();

  const show = (frame) => {
    stage.style.setProperty("--frame", frame);
    slider.value = frame;
    shown.textContent = `${frame + 1} / ${count}`;
  };
  const tick = (now) => {
    if (!stage.classList.contains("playing")) return;
    if (stage.parentElement.open) {
      const frame = Math.floor((now - started) / Number(stage.dataset.ms)) % count;
      if (frame !== Number(slider.value)) show(Math.max(frame, 0));
    }
    requestAnimationFrame(tick);
  };
  const play = (on) => {
    stage.classList.toggle("playing", on);
    if (!on) return;
    started = performance.now() - Number(slider.value) * Number(stage.dataset.ms);
    requestAnimationFrame(tick);
  };

  stage.classList.add("scripted");
  slider.addEventListener("input", () => {
    play(false);
    show(Number(slider.value));
  });
  stage.querySelector("button").addEventListener("click", () => {
    play(!stage.classList.contains("playing"));
  });
  show(0);
  play(!still);
}
