// An input for photos. The photo is read in the browser; the component's value is a data URL.
const zone = element.querySelector(".zone");
const input = zone.querySelector("input");
const shown = zone.querySelector("img");
const error = element.querySelector(".error");
const examples = element.querySelector(".examples");

const showError = (message) => {
  error.textContent = message;
  error.hidden = !message;
};
const show = () => {
  shown.hidden = !props.value;
  if (props.value) shown.src = props.value;
};
const send = (url) => {
  showError("");
  props.value = url;
  show();
  trigger("input");
};
const load = (file) => {
  if (!file) return;
  if (file.size > props.largest) {
    const [size, limit] = [file.size, props.largest].map((bytes) => Math.ceil(bytes / 1e6));
    showError(`The file has ${size} MB, the limit is ${limit} MB: send a smaller one.`);
    return;
  }
  const reader = new FileReader();
  reader.onload = () => send(reader.result);
  reader.onerror = () => showError("The browser cannot read this file.");
  reader.readAsDataURL(file);
};
const showExamples = () => {
  examples.replaceChildren(
    ...props.examples.map(({ name, url }) => {
      const button = document.createElement("button");
      const picture = document.createElement("img");
      picture.src = url;
      picture.alt = name;
      button.title = name;
      button.type = "button";
      button.append(picture);
      button.onclick = () => send(url);
      return button;
    }),
  );
};

shown.onerror = () => { shown.hidden = true; };
input.onchange = () => {
  load(input.files[0]);
  input.value = "";
};
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  zone.addEventListener(kind, (event) => {
    event.preventDefault();
    zone.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") load(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  load(files.find((file) => file.type.startsWith("image/")));
});
watch("value", show);
watch("examples", showExamples);
show();
showExamples();
