// Takes the clock over from the style sheet, so that a scene can be paused, dragged and raced.
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
// A race that takes longer is played faster; the time that it shows is the real one.
const LONGEST_S = 6;
const HOLD_S = 1.5;
for (const stage of document.querySelectorAll(".stage")) {
  const slider = stage.querySelector("input[type=range]");
  const race = stage.querySelector("input[type=checkbox]");
  const shown = stage.querySelector("output");
  const count = Number(slider.max) + 1;
  const racers = [...stage.querySelectorAll("[data-ends]")].map((element) => ({
    element, ends: element.dataset.ends.split(",").map(Number),
  }));
  const slowest_s = Math.max(0, ...racers.map(({ ends }) => ends.at(-1)));
  const faster = Math.max(1, slowest_s / LONGEST_S);
  let started = performance.now();

  const show = (frame) => {
    stage.style.setProperty("--frame", frame);
    slider.value = frame;
    shown.textContent = `${frame + 1} / ${count}`;
  };
  // Frames of a chunk are seen one after the other while the next is made, as in race.gif.
  const done = (ends, now_s) => {
    const chunk = ends.findIndex((end) => end > now_s);
    if (chunk < 0) return count;
    const begin = chunk ? ends[chunk - 1] : 0;
    return ((chunk + (now_s - begin) / (ends[chunk] - begin)) / ends.length) * count;
  };
  const run = (now_s) => {
    let most = 0;
    for (const { element, ends } of racers) {
      const frame = Math.max(Math.floor(done(ends, now_s)) - 1, 0);
      element.style.setProperty("--frame", frame);
      most = Math.max(most, frame);
    }
    stage.style.setProperty("--frame", most);
    shown.textContent = `${Math.min(now_s, slowest_s).toFixed(1)} s`;
  };
  const tick = (now) => {
    if (!stage.classList.contains("playing")) return;
    if (stage.closest("details").open) {
      if (race.checked) {
        const shown_s = Math.max(0, (now - started) / 1000) % (slowest_s / faster + HOLD_S);
        run(shown_s * faster);
      } else {
        const frame = Math.floor((now - started) / Number(stage.dataset.ms)) % count;
        if (frame !== Number(slider.value)) show(Math.max(frame, 0));
      }
    }
    requestAnimationFrame(tick);
  };
  const play = (on) => {
    const played = stage.classList.contains("playing");
    stage.classList.toggle("playing", on);
    if (!on) return;
    started = performance.now();
    if (!race.checked) started -= Number(slider.value) * Number(stage.dataset.ms);
    if (!played) requestAnimationFrame(tick);
  };
  const together = () => {
    race.checked = false;
    for (const { element } of racers) element.style.removeProperty("--frame");
  };

  stage.classList.add("scripted");
  race.parentElement.hidden = slowest_s === 0;
  race.addEventListener("change", () => {
    if (!race.checked) together();
    play(true);
  });
  slider.addEventListener("input", () => {
    together();
    play(false);
    show(Number(slider.value));
  });
  stage.querySelector("button").addEventListener("click", () => {
    play(!stage.classList.contains("playing"));
  });
  show(0);
  play(!still);
}
