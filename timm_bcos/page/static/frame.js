// A document of its own, cut off from the page but for its height.
const frame = element.querySelector("iframe");
const show = () => {
  frame.hidden = !props.value;
  frame.srcdoc = props.value || "";
};
window.addEventListener("message", (event) => {
  const height = Number(event.data?.height);
  if (event.source === frame.contentWindow && height > 0) frame.style.height = `${Math.min(height, 20000)}px`;
});
watch("value", show);
if (props.value) show();
